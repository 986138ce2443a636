"""Reference training runs: tasks (data sets), networks for them, and the loop that trains one network."""
