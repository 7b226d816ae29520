"""What Alembic runs for every command; the connection and its transaction come from make_us_rich.core.database."""

from alembic import context

from make_us_rich.core.tables import TableBase

context.configure(connection=context.config.attributes["connection"], target_metadata=TableBase.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
