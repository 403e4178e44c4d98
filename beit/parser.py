"""The parser of the programs' flags, and kinds of flags. Imports no PyTorch, so that --help and errors come at once."""

import argparse
import os
import re
import sys
from typing import Any, Callable, Container, Dict, FrozenSet, List, Optional

from beit import recipes
from beit.distributed.launch_environment import reports_errors
from beit.errors import UserError, escape_text, nearest, print_line, required_output
from beit.log import log_main
from beit.outputs import args_yaml

COLUMN = 24  # where a flag's help begins
OF_FOLDER = ('log_dir', 'resume', 'auto_resume', 'start_epoch', 'results_file')  # valid for one output_dir only
# Above 0 where torchrun (--max_restarts) or SLURM (--requeue) has restarted this program, which then must resume.
RESTARTS = ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')


# ---- the parser

class OneLineHelp(argparse.RawDescriptionHelpFormatter):
    """Help in which a flag is one line of at most 100 columns: its names, what it does, its default in brackets."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ', '.join(action.option_strings) or action.dest

    def _format_action(self, action: argparse.Action) -> str:  # what a long name puts on its own line follows it
        return super()._format_action(action).replace('\n' + ' ' * COLUMN, '  ', 1)


class ParsedFlags(argparse.Namespace):
    """The flags by name. `typed` has the names of the flags on the command line, `given` also those set by files."""
    __slots__ = ('given', 'typed')  # outside of `vars`, which holds flags only


class OneLineParser(argparse.ArgumentParser):
    """A parser with one-line help and errors, which suggests known flags. --help shows only `usage` in brackets."""

    def __init__(self, prog: str, usage: str, **options: Any) -> None:
        super().__init__(prog, usage='python %s %s' % (prog, usage), allow_abbrev=False,
                         formatter_class=OneLineHelp, **options)
        self.synonyms: Dict[str, str] = {}  # {what other projects call a flag: its name here}
        self.logs = True  # which flags of a --config file do not count
        self._optionals.title = 'options'  # before Python 3.10 "optional arguments"

    def error(self, message: str) -> Any:
        message = re.sub('^argument (?=--)', '', message)
        raise UserError(re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", lambda found: 'unknown value %s; it must '
                               'be one of %s' % (found.group(1), found.group(2).replace("'", '')), message))

    def _print_message(self, message: str, file: Any = None) -> None:
        if reports_errors():
            with required_output('the help'):
                print_line(message.rstrip('\n'))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = normalize_argv(sys.argv[1:] if args is None else list(args))
        parsed, rest = self.parse_known_args(args, ParsedFlags() if namespace is None else namespace)
        given = {self._option_string_actions[name].dest for name in (arg.partition('=')[0] for arg in args)
                 if name in self._option_string_actions}
        typed = frozenset(given)
        if getattr(parsed, 'config', None) or getattr(parsed, 'recipe', ''):  # again: the command line overrides files
            config = self.read_config(parsed.config)
            if 'output_dir' in typed:
                self.drop_flags_of_folder(config, parsed.output_dir)
            recipe = self.add_recipe(config, parsed, typed)
            given.update(name for name, value in vars(config).items() if value != self.get_default(name))
            parsed, rest = self.parse_known_args(args, config)
            if recipe:
                parsed.recipe = recipe
        if 'config' in parsed:
            del parsed.config  # the other flags have its values now
        if 'auto_resume' in parsed:  # only training has this flag
            parsed.auto_resume |= any(os.environ.get(name, '0') not in ('', '0') for name in RESTARTS)
        if rest:
            raise self.unknown_flag(rest[0].partition('=')[0])
        if isinstance(parsed, ParsedFlags):
            parsed.given, parsed.typed = frozenset(given), typed
        return parsed

    def unknown_flag(self, flag: str) -> UserError:
        if not flag.startswith('-'):
            return UserError('%r is not a flag; flags begin with --, as in --data_path=/data/ImageNet2012' % flag)
        return UserError('%s: unknown flag; %s' % (flag, self.suggest(flag.lstrip('-'), '--')))

    def suggest(self, name: str, dashes: str = '') -> str:
        """Advice that names up to three flags that resemble `name`, which has no dashes before it."""
        known = [option[2:] for option in self._option_string_actions if option.startswith('--')]
        name = name.replace('-', '_')
        found = [name] if name in self.synonyms else nearest(name, [*known, *self.synonyms])
        flags = dict.fromkeys(self.synonyms.get(each, each) for each in found)
        near = ' or '.join(dashes + flag for flag in flags)
        return 'did you mean %s?' % near if near else 'see --help'

    def add_recipe(self, config: Any, parsed: argparse.Namespace, typed: FrozenSet[str]) -> str:
        """Add a recipe's flags to a --config file's, which win unless --recipe is typed. Returns the recipe's name."""
        name = parsed.recipe if 'recipe' in typed else getattr(config, 'recipe', '')
        if not name:
            return ''
        weights = ('model', 'finetune')
        chosen = recipes.choose(**{flag: getattr(parsed if flag in typed else config, flag) for flag in weights
                                   if flag in typed | config.given}) if name == recipes.AUTO else name
        known = [*recipes.NO_FLAGS, *(option[2:] for option in self._option_string_actions)]
        recipe = self.read_config(recipes.path_of(chosen, self.prog, known), recipes.NO_FLAGS)
        kept = set(weights if name == recipes.AUTO else ()) | (set() if 'recipe' in typed else config.given)
        vars(config).update((flag, getattr(recipe, flag)) for flag in recipe.given - kept)
        return chosen

    def read_config(self, path: Optional[str], no_flags: Container[str] = ()) -> Any:
        """The flags of a --config file or a recipe; `given` names them. A `UserError` names the file and the key."""
        parsed, known = ParsedFlags(), self._option_string_actions
        parsed.given = set()
        for key, value in args_yaml.read(path).items() if path else ():
            if key in no_flags and '--' + key not in known:
                continue
            shown, flag = '--config %s: %s' % (escape_text(path or ''), escape_text(key)), '--' + key.replace('-', '_')
            if flag in ('--help', '--config'):
                raise UserError('%s: this one works on the command line only' % shown)
            if flag not in known:
                raise UserError('%s: no flag has this name; %s' % (shown, self.suggest(key)))
            if value is None:  # null, the default
                continue
            parsed.given.add(known[flag].dest)
            if known[flag].nargs == 0:
                flag, value = self.bool_option(known[flag], value, shown), []
            elif not isinstance(known[flag], OneOrMore) and isinstance(value, list) != (known[flag].nargs is not None):
                raise UserError('%s: it takes %s' % (shown, 'one value, not a list' if known[flag].nargs is None else
                                                     'a list of numbers, as in [0.9, 0.999]'))
            try:
                args = [flag + '=' + value] if isinstance(value, str) else [flag] + value
                if self.parse_known_args(normalize_argv(args), parsed)[1]:
                    raise UserError('%d values are too many' % len(value))
            except UserError as error:
                raise UserError('%s: %s' % (shown, re.sub('^%s: ' % flag, '', str(error)))) from None
        return parsed

    def bool_option(self, action: argparse.Action, value: Any, shown: str) -> str:
        """The option that sets a boolean flag to a file's `value`."""
        if str(value).lower() not in ('true', 'false'):
            raise UserError('%s: it must be true or false, got %r' % (shown, value))
        wanted = action.const if str(value).lower() == 'true' else not action.const
        return next(each.option_strings[0] for each in self._actions
                    if each.dest == action.dest and each.const is wanted)

    def drop_flags_of_folder(self, config: argparse.Namespace, output_dir: str) -> None:
        """Drop flags of a --config file that are valid for its output_dir only; the command line names another."""
        theirs = getattr(config, 'output_dir', '')
        if not theirs or output_dir and os.path.realpath(output_dir) == os.path.realpath(theirs):
            return
        evaluates = getattr(config, 'eval', False)  # then --resume names the checkpoint to evaluate
        dropped = {name: vars(config).pop(name) for name in OF_FOLDER
                   if hasattr(config, name) and not (name == 'resume' and evaluates)}
        shown = ['--%s%s' % (name, '' if value is True else ' ' + escape_text(str(value)))
                 for name, value in dropped.items() if value]
        if shown and self.logs and reports_errors():
            log_main('Not taken from --config, because they belong to its output_dir %s: %s'
                     % (escape_text(theirs), ', '.join(shown)))


def normalize_argv(args: List[str]) -> List[str]:
    """Replace `-` by `_` in flags; refuse arguments that argparse would misread or drop."""
    for arg in args:
        if '\0' in arg:
            raise UserError('%r: a flag cannot hold a NUL character' % arg)
        if re.match(r'--[^=]+=--$', arg):
            raise UserError('%s: -- is not a value' % arg)
    return [re.sub(r'^--[^=]+', lambda flag: '--' + flag.group()[2:].replace('-', '_'), arg) for arg in args]


# ---- kinds of flags

def bounded_number(kind: Callable[[str], Any], low: Optional[float] = None, high: Optional[float] = None,
                   above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float from `low` (or above it) to `high`."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError('%r is not %s' % (text, 'a whole number' if kind is int else 'a number'))
        if value != value or value in (float('inf'), float('-inf')):
            raise argparse.ArgumentTypeError('%r is not a finite number' % text)
        if low is not None and (value <= low if above else value < low):
            raise argparse.ArgumentTypeError('must be %s %s, got %s' % ('above' if above else 'at least', low, text))
        if high is not None and value > high:
            raise argparse.ArgumentTypeError('must be at most %s, got %s' % (high, text))
        return value
    return parse


class OneOrMore(argparse.Action):
    """Takes one value, as it is, or several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def add_bool_flag(group: Any, name: str, default: bool, help: str, off: Optional[str] = None) -> None:
    """Add a boolean flag: --name turns it on, --no_name (or `off`, unless empty) turns it off."""
    off = 'no_' + name if off is None else off
    group.add_argument('--' + name, action='store_true', default=default,
                       help='%s (%s)' % (help, 'on; off by --' + off if default else 'off'))
    if off:
        group.add_argument('--' + off, action='store_false', dest=name, help=argparse.SUPPRESS)
