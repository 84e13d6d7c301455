"""Seven domains of four-way multiple-choice items, built from packages that can be installed: see SOURCES.md.

`items` has what all share: what an item is, how keys are split, how choices are put together. Each domain is one file with
one function that returns its items; `maths` and `coding` generate theirs, the others read a source. `build` is the command,
`control` the reader that sees the choices only.
"""
