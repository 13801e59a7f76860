"""Token streams, the patterns that interleave them, and the layout that packs them into one sequence."""
