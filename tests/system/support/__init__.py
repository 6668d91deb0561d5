"""Starts and stops what the system tests need: brokers, workers, the exporter, Flower's own code."""
