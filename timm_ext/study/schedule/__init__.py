"""Which steps a plan asks for, and what each needs: of its cases, its source networks and its runs."""
