"""Fetch a checkpoint from the Hugging Face hub: the same as `minipaged fetch`.

python model_weights_fetch.py --list
python model_weights_fetch.py HuggingFaceTB/SmolLM2-135M-Instruct
python model_weights_fetch.py facebook/opt-125m --revision main --dir models/opt-125m
"""

import sys

from minipaged.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "fetch")
    main()
