"""Starts and stops what the system tests need: brokers, workers, the exporter and Flower's own code."""
