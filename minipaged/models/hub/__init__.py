"""From a name on the Hugging Face hub to a folder that loads. Nothing of this runs unasked.

    catalogue     small models that are known by name, with sizes and licences
    local_models  where models lie on this machine, and what a name is
    hub           what the hub offers under a name, and the bytes of one file
    failures      what goes wrong on the way there, in sentences
    staging       the folder beside the target that all of it goes into first
    convert       pickled weights to safetensors
    fetch         all of it: downloaded, checked, converted, then named

What a person sees of it is printed by `fetch_command.py`, beside this folder.
"""
