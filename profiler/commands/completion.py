"""`everflame completion`: the script with which a shell completes commands and options.

The shell then calls everflame with _ARGCOMPLETE set to complete a word; `main` lets argcomplete
respond, from the same parsers that read a command line.
"""

import argparse

from argcomplete.shell_integration import shellcode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        '  eval "$(everflame completion bash)"            in ~/.bashrc\n'
        '  eval "$(everflame completion zsh)"             in ~/.zshrc, after compinit\n'
        "  everflame completion fish > ~/.config/fish/completions/everflame.fish"
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def run(options: argparse.Namespace) -> int:
    print(shellcode(["everflame"], shell=options.shell))
    return 0
