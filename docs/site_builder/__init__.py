"""Builds the documentation site: chapters that are run, code that is quoted by its name.

Not part of the installed package. Read in this order:

    errors.py           what stops a build
    names.py            a dotted name -> the lines of its source
    fences.py           which lines of a page are text, and which are code
    companion.py        `{{ lines minipaged.memory.allocator }}` -> where that is
    quote_code.py       a line `@@ minipaged.memory.allocator.BlockAllocator` -> that source
    links.py            a link to a file of the repository -> one to the page of its source
    sources.py          those pages
    markdown.py         the three together: what is done to every page
    chapters.py         a percent script -> a notebook
    execution.py        a notebook -> the notebook with its outputs, once
    tutorial_pages.py   a notebook with its outputs -> a page with its pictures
    tutorials.py        all chapters: pages, downloads, and the page that lists them
    lab_pages.py        the briefs of the labs
    navigation.py       a folder in the navigation -> its pages
    hooks.py            MkDocs calls this
    __main__.py         and any other site builder that
"""
