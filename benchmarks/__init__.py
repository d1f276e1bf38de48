"""What the package is measured by: each module is a program, run from the root of the source tree."""
