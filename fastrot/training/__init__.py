"""One run: begun or resumed, trained, summed up; the loop, its state and its files."""
