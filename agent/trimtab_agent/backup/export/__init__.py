"""Backups as block devices and as files: an NBD server, the process it runs in, and images that are made while they are read."""
