"""Whether a guest that is on no network answers at a TCP port."""
