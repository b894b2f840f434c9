"""Training causal language models from the command line: `python -m hf_mars.clm`, and run_clm.py in a checkout.

Importing this package imports nothing else. Its modules, each of which imports only those above it:

    errors, log        UsageError; the logger that all share
    files              which files can be read; globs
    texts              files, a data set of the Hub or the packaged novel → Texts for training and for validation
    token_bins         token files as nanoGPT writes them, for those who have tokenised already
    bpe                Texts → a byte-level BPE
    blocks             Texts or TokenBins → blocks of tokens
    metrics            loss, perplexity and next-token accuracy
    processes          steps that the processes of a job take together
    arguments          the dataclasses of arguments
    argument_files     yaml and json files of arguments
    early              mistakes that show before torch is imported
    command_line       words of the command line → arguments
    checks             combinations of arguments that cannot work
    output_folder      where a run starts, and what it may remove
    adapters, model    LoRA; the configuration and the model
    tokenizer          the tokenizer, read or trained
    splits             the texts and blocks of a run
    report             the last lines that are printed
    run                main
    start              early, then run
"""
