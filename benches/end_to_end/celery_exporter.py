"""Starts celery-exporter, because its wheel has no command."""

from src.cli import cli

cli()
