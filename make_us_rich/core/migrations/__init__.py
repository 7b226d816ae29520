"""Alembic's scripts: how the tables of make_us_rich.core.database came to be, one step a file."""
