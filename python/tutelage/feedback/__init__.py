"""People in the loop: the labelling page, what it stores, and the rows that come of it."""
