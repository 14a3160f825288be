"""`torchrun --nproc_per_node=N finetune.py configs/lora.yaml [section.key=value ...]`.

The same program as the command `finetune`; without a command it trains. The name `finetune` means
the package beside this file, because Python prefers a package to a module.
"""

from finetune.cli import main

if __name__ == "__main__":
    main()
