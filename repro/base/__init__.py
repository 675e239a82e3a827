"""What everything stands on: files, checks of values, numbers with their intervals, the settings of an experiment."""
