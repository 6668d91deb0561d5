"""Starts celery-exporter, whose wheel has no command."""

from src.cli import cli

cli()
