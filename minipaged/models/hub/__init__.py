"""From a name on the Hugging Face hub to a folder that loads.

    catalogue     small models that are known by name, with sizes and licences
    local_models  from a model's name to its folder on this machine
    hub           what the hub offers under a name, and the bytes of one file
    failures      what can go wrong on the way, in sentences
    staging       the folder next to the target where all files go first
    convert       pickled weights to safetensors
    fetch         all of it: downloaded, checked, converted, then named

Nothing of this runs unless you ask: by `minipaged fetch`, which is in `cli/fetch.py`.
"""
