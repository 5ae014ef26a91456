"""The repository: a content-addressed, encrypted store of chunks on a folder or a bucket. docs/backup-format.md is its format.

blobs ← folder, bucket        names and bytes; the one seam to storage
keys ← sealing ← packs        who may read, and how a record is written
chunk_index                   which chunk lies where; derived, may be lost
manifests, pages              what a backup consists of
sessions ← writer, reader     the leases that prune waits for
prune, verify, rebuild        upkeep
repository                    opens and joins them
"""
