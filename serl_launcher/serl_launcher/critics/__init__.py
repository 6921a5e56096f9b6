"""Value functions over pooled policy features and executed action chunks."""
