"""Backups: the repository they are kept in, the reader of a running vm's disks, and the jobs that join both."""
