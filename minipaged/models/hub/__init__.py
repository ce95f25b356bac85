"""Downloads models from the Hugging Face hub to folders that can be loaded.

    catalogue     the list of small models, with sizes and licences
    local_models  finds the folder of a model on this machine
    hub           lists a model's files on the hub, and downloads one file
    failures      error messages of a download
    staging       the temporary folder next to the target
    convert       pickled weights to safetensors
    fetch         the whole procedure: download, check, convert, rename

It runs only when you ask, by `minipaged fetch` (`cli/fetch.py`).
"""
