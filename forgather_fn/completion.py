"""``forgather completion``: what a shell needs to complete commands and their options."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_BASH: Final = """_forgather() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" name command=""
    for name in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case " {commands} " in *" $name "*) command="$name"; break ;; esac
    done
    case "$command" in
        "") COMPREPLY=($(compgen -W "{commands} -t -p --help" -- "$word")) ;;
{cases}
    esac
    [[ "$word" == -* ]] || COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _forgather forgather
"""
_ZSH: Final = "autoload -U +X bashcompinit && bashcompinit\n"


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather completion`` to a parser, and give what prints the script."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    parser.epilog = 'example: eval "$(forgather completion bash)"'

    def execute(options: argparse.Namespace) -> int:
        from forgather_fn.cli import options_of

        print(script(options.shell, options_of()), end="")
        return 0

    return execute


def script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """Write the script of a shell.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
        options: For each command, its options.
    """
    if shell == "fish":
        lines = [f"complete -c forgather -n __fish_use_subcommand -a '{' '.join(options)}'"]
        for name, flags in options.items():
            for flag in flags:
                kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                lines.append(f"complete -c forgather -n '__fish_seen_subcommand_from {name}' {kind}")
        return "\n".join(lines) + "\n"
    cases = "\n".join(
        f'        {name}) COMPREPLY=($(compgen -W "{" ".join(flags)}" -- "$word")) ;;'
        for name, flags in options.items()
    )
    text = _BASH.format(commands=" ".join(options), cases=cases)
    return _ZSH + text if shell == "zsh" else text
