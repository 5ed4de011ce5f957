"""Everything that knows Lightning's insides, for the callbacks."""
