"""Reads machines of other systems from files on the operator's machine and says what of them Trimtab can express. Nothing here talks
to the controller: what comes out is a plan, and disks as `qcow2` or `raw` files that are uploaded as any image is.

What is read is nobody's friend: every size is bounded before it is believed, XML with declarations is refused, names never become
paths, and no format is guessed from content.
"""
