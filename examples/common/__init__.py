"""What the worked cases share: packages, stages, statistics, the page."""
