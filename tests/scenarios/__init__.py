"""Scenario files, the world that plays them, and what they demand of failover."""
