"""Alembic's environment. One migration does one thing and works while the previous release still runs."""
