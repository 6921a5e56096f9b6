"""What a run shows of itself: metrics, the dashboard's lines, the summary and the learning curve."""
