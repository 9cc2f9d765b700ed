"""Features of student and teacher: tapped, matched, aligned."""
