"""Teaching labs: the library's own classes with some bodies removed, and what grades them.

    lab.py          what a lab is: its tasks, and which bodies a student writes
    catalogue.py    the labs; each is described in a file of its own, lab1_allocator.py and so on
    starter.py      a student's file, generated from the library's classes
    plugin.py       what the tests of all labs share: `pytest -m "lab(number=1)" --part ...`
    complaints.py   why a test failed: yours, expected, and after which calls
    grading.py      grades a solution, task by task
    verdict.py      the points that a run's report is worth
    runs.py         one run of a task's tests, in a process of its own
    fork_server.py  starts that process as a copy of one that has imported torch already
    child.py        what happens in that process
    seal.py         notices that student code replaced what its tests rely on
    own_work.py     what a solution takes from the library
    progress.py     what a student has so far
    gradescope.py   the files that Gradescope wants
    challenge.py    lab 9: any policy, measured by the simulator
    referee.py      refuses a policy that cheats
    tests/          a file for each lab; they are also the library's own tests

The commands `minipaged lab ...` are in `cli/`. There is no second tree with solutions: the library
is the solution.
"""
