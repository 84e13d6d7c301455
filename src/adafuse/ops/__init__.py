"""One file per operation: the plain reference, the kernel and its launcher; and what several of them share. Imports torch only."""
