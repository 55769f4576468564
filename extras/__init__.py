"""What surrounds the method: nobody who learns it needs these files."""
