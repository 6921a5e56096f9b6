"""Demonstrations from elsewhere (`demos=`) into a run's journal, before its roles start."""
