"""What is learned: one algorithm a file, both halves; aggregators, selectors, the sum in a fixed order."""
