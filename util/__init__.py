"""What every run needs beside its concepts: the progress line and its kin."""
