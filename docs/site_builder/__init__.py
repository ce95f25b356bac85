"""Builds the documentation site: chapters that are run, code that is quoted by its name.

Not part of the installed package. Read in this order:

    names.py            a dotted name -> the lines of its source
    markdown.py         what is done to every page: places, links and quotes filled in
    sources.py          pages with the source of the files that others link to
    chapters.py         a percent script -> a notebook
    imports.py          a script -> all files that its outputs can come from
    execution.py        a notebook -> the notebook with its outputs, once
    tutorial_pages.py   a notebook with its outputs -> a page with its pictures
    tutorials.py        all chapters and labs: pages, downloads, and the pages that list them
    hooks.py            MkDocs calls this
    __main__.py         and any other site builder that
"""
