"""Comparing initialisations by fine-tuning from them.

What to open for what:

`plan`      what a user asks for
`arms`      the rows of the tables
`schedule`  which steps a plan asks for, of cases, source networks and runs
`study`     all of these steps, and which of them the report reads
`step`      what a step is
`steps`     the work itself: data, source networks, runs
`runner`    hands steps to worker processes
`worker`    such a process
`records`   the folder with what the steps returned
`outcomes`  what they return
`cost`      what is expected to take how long
`bars`      what is left of that
`report`    tables, figures and page
`run`       from plan to report
`demo`      the study of `demo.yaml`
"""
