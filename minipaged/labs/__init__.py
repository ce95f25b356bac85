"""Teaching labs: the library's own classes with some bodies removed, and their grader.

    lab.py          the structure of a lab: its tasks, and the bodies that a student writes
    catalogue.py    the list of labs; each has its own file, lab1_allocator.py and so on
    starter.py      a student's file, generated from the library's classes
    plugin.py       shared by all lab tests: `pytest -m "lab(number=1)" --part ...`
    complaints.py   explains a failed test: yours, expected, and the calls before it
    grading.py      grades a solution, task by task
    verdict.py      converts a run's report to points
    runs.py         one run of a task's tests, in a separate process
    fork_server.py  forks that process from one that has already imported torch
    child.py        the code that runs in that process
    seal.py         detects that student code replaced something its tests rely on
    own_work.py     detects code that a solution takes from the library
    progress.py     a student's points and hints so far
    gradescope.py   the files for Gradescope
    challenge.py    lab 9: any policy, measured by the simulator
    referee.py      detects a policy that cheats
    tests/          one file per lab; the library also uses them as its own tests

The commands `minipaged lab ...` are in `cli/`. There is no second tree with solutions: the library
is the solution.
"""
