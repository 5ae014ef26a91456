"""Pure decisions: no clock, no randomness, no logging, no I/O; `now` and `rng` are arguments. Standard library, numpy in `placement/`."""
