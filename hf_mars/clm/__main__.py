"""`python -m hf_mars.clm …` is run_clm.py for those who have no checkout."""

from hf_mars.clm.start import command

if __name__ == "__main__":
    command("python -m hf_mars.clm")
