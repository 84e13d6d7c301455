"""One file per operation: the plain reference and, beside it, the kernel and its launcher. Imports torch only."""
