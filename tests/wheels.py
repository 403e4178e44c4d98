"""Names and signatures in the published torch_npu wheels, downloaded once and read without importing them. Importing
needs CANN, which needs an NPU's machine.
"""

import ast
import collections
import functools
import glob
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

OLDEST = '2.1.0.post17'
NEWEST_KNOWN = ['2.13.0', '2.14.0']  # used when the registry's list can't be read
PYTHONS = ('3.11', '3.10', '3.12', '3.13')  # the wheel's, not this Python's; its Python files don't depend on it
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')


class OutOfReach(Exception):
    """Neither the registry nor the cache has the wheel."""


# ---- download

def cache_folder():
    return os.environ.get('TORCH_NPU_WHEELS') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'beit_torch_npu_wheels')


def numbers(version):
    """2.12.0.post3 as (2, 12, 0, 3), to compare; None for anything but a release."""
    match = re.match(r'(\d+(?:\.\d+)*)(?:\.post(\d+))?$', version)
    return match and tuple(int(n) for n in match.group(1).split('.')) + (int(match.group(2) or 0),)


def newest(versions, requirements):
    """The newest torch_npu, by its version prefix, for each of the two newest PyTorch that requirements.txt allows.

    Returns a list, oldest first.
    """
    at_least, below = re.search(r'^torch>=([\d.]+),<([\d.]+)', requirements, re.MULTILINE).groups()
    fitting = [v for v in versions if numbers(v) and numbers(at_least)[:-1] <= numbers(v) < numbers(below)[:-1]]
    by_release = {numbers(version)[:2]: version for version in sorted(fitting, key=numbers)}
    return list(by_release.values())[-2:]


def _pip(*words, timeout):
    command = [sys.executable, '-m', 'pip'] + list(words) + [
        '--no-deps'] * (words[0] == 'download') + [
        '--disable-pip-version-check', '--retries=1', '--timeout=15', '--only-binary=:all:']
    try:
        run = subprocess.run(command + ['--platform=' + p for p in PLATFORMS], timeout=timeout, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, universal_newlines=True)
    except subprocess.TimeoutExpired:
        return '', 'pip took more than %d s' % timeout
    return (run.stdout, '') if run.returncode == 0 else ('', (run.stderr.strip().splitlines() or ['pip failed'])[-1])


def published():
    """The versions in the registry, or [] if it can't be reached."""
    listed, _ = _pip('index', 'versions', 'torch_npu', '--python-version=' + PYTHONS[0], timeout=60)
    match = re.search(r'^Available versions: (.*)$', listed, re.MULTILINE)
    return match.group(1).split(', ') if match else []


def _cached(version='*'):
    return sorted(path for path in glob.glob(os.path.join(cache_folder(), 'torch_npu-%s-*.whl' % version))
                  if zipfile.is_zipfile(path))


def wheel(version):
    """The path of that version's wheel, from the cache or the registry.

    Raises:
        OutOfReach: neither has it.
    """
    if _cached(version):
        return _cached(version)[0]
    os.makedirs(cache_folder(), exist_ok=True)
    folder = tempfile.mkdtemp(dir=cache_folder())
    try:
        for python in PYTHONS:
            _, problem = _pip('download', 'torch_npu==' + version, '--dest=' + folder, '--python-version=' + python,
                              timeout=300)
            for name in os.listdir(folder):
                os.replace(os.path.join(folder, name), os.path.join(cache_folder(), name))  # a complete file or none
                return os.path.join(cache_folder(), name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise OutOfReach('torch_npu %s cannot be downloaded (%s)' % (version, problem))


def wheels(requirements):
    """[`Library`, …]: the oldest torch_npu supported, and the newest two that the text of requirements.txt allows."""
    recent = newest(published(), requirements) \
        or newest([os.path.basename(path).split('-')[1] for path in _cached()], requirements) or NEWEST_KNOWN
    return [Library.from_wheel(wheel(version), 'torch_npu ' + version) for version in [OLDEST] + recent]


# ---- names

# kind: module, class, method, function, value, operator (node: its schemas), compiled, or outside (of another package,
# or the unknown result of a call). home: the module where it is defined.
Found = collections.namedtuple('Found', 'kind node home')
OUTSIDE = Found('outside', None, None)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def dotted(node):
    """'a.b.c' for the syntax tree of a.b.c, else None."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return base and base + '.' + node.attr


class Library:
    """Packages as text: a wheel, a folder, or a dictionary from path to source.

    Names are resolved by files and syntax trees: definitions, assignments, imports, star imports, `__all__`, base
    classes; for torch_npu also the names that it adds during its import: `torch_npu.x = torch.ops.npu.x`, its
    lazy exports, and torch.npu, which is torch_npu.npu. Names of the compiled part are searched among its strings.
    """

    def __init__(self, name, paths, read):
        self.name, self.paths, self._read, self._bindings = name, frozenset(paths), read, {}

    @classmethod
    def from_wheel(cls, path, name):
        archive = zipfile.ZipFile(path)
        return cls(name, archive.namelist(), archive.read)

    @classmethod
    def from_folder(cls, folder, name):
        paths = [os.path.relpath(path, folder).replace(os.sep, '/')
                 for path in glob.glob(os.path.join(folder, '**', '*.py'), recursive=True)]

        def read(path):
            with open(os.path.join(folder, path), 'rb') as file:
                return file.read()
        return cls(name, paths, read)

    @classmethod
    def from_texts(cls, name, texts):
        return cls(name, texts, lambda path: texts[path].encode('utf-8'))

    def file_of(self, module):
        base = module.replace('.', '/')
        return next((path for path in (base + '/__init__.py', base + '.py') if path in self.paths), None)

    def tree(self, module):
        return ast.parse(self._read(self.file_of(module)).decode('utf-8'))

    def bindings(self, module):
        """Name to what it's bound to at the module's top level: a syntax tree, or the dotted name that's imported."""
        if module not in self._bindings:
            self._bindings[module] = {}  # for a module that imports itself
            found = {}
            self._bind(self.tree(module).body, module, found)
            self._bindings[module] = found
        return self._bindings[module]

    def _bind(self, statements, module, found):
        for statement in statements:
            if isinstance(statement, FUNCTIONS + (ast.ClassDef,)):
                found[statement.name] = statement
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    found[alias.asname or alias.name.partition('.')[0]] = (
                        alias.name if alias.asname else alias.name.partition('.')[0])
            elif isinstance(statement, ast.ImportFrom):
                self._bind_from(statement, module, found)
            elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                    for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                        if isinstance(name, ast.Name):
                            found[name.id] = statement.value
            elif isinstance(statement, ast.Delete):
                for target in statement.targets:
                    found.pop(dotted(target), None)
            else:  # if, try, with, for
                for block in ('body', 'orelse', 'finalbody'):
                    self._bind(getattr(statement, block, []), module, found)
                for handler in getattr(statement, 'handlers', []):
                    self._bind(handler.body, module, found)

    def _bind_from(self, statement, module, found):
        parts = module.split('.') if statement.level else []
        if statement.level:
            parts = parts[:len(parts) - statement.level + (self.file_of(module) or '').endswith('/__init__.py')]
        base = '.'.join(parts + ([statement.module] if statement.module else []))
        for alias in statement.names:
            if alias.name != '*':
                found[alias.asname or alias.name] = base + '.' + alias.name
            elif self.file_of(base):
                for name in self.public(base):
                    found[name] = base + '.' + name

    def public(self, module):
        """The names that `from module import *` imports."""
        names = self.bindings(module)
        listed = names.get('__all__')
        if isinstance(listed, (ast.List, ast.Tuple)):
            return [ast.literal_eval(element) for element in listed.elts]
        return [name for name in names if not name.startswith('_')]

    def look_up(self, name):
        """The `Found` of a dotted name, or None if it doesn't exist. 'a.B().c' is an attribute of an instance."""
        if name == 'torch.npu' or name.startswith('torch.npu.'):
            name = 'torch_npu.npu' + name[len('torch.npu'):]
        if name.startswith('torch.ops.npu.'):
            schemas = self._operators.get(name.split('.')[3])
            return Found('operator', schemas, name) if schemas else None
        parts = name.split('.')
        if not self.file_of(parts[0]):
            return OUTSIDE
        found = Found('module', None, parts[0])
        for part in parts[1:]:
            found = self.member(found, part.replace('()', ''))
            if found is None or found is OUTSIDE:
                return found
            if part.endswith('()'):
                found = found._replace(kind='instance') if found.kind == 'class' else OUTSIDE
        return found

    def member(self, owner, name):
        if owner.kind == 'module':
            return self._module_member(owner.home, name)
        if owner.kind in ('class', 'instance'):
            return self._class_member(owner, name)
        if owner.kind == 'compiled':
            return owner if self._is_compiled(name) else None
        return OUTSIDE

    def _module_member(self, module, name):
        full = module + '.' + name
        if module == 'torch_npu._C' or module.startswith('torch_npu._C.'):
            return Found('compiled', None, full) if self._is_compiled(name) else None
        bound = self.bindings(module).get(name)
        if isinstance(bound, str) and bound != full:
            return self.look_up(bound)
        if isinstance(bound, ast.AST):
            return self._classify(bound, module)
        if self.file_of(full):
            return Found('module', None, full)
        if full == 'torch_npu._C':
            return Found('module', None, full)
        if module == 'torch_npu' and name in self._injected:
            return self.look_up(self._injected[name]) if self._injected[name] else Found('value', None, module)
        return None

    def _classify(self, node, module):
        if isinstance(node, FUNCTIONS):
            return Found('function', node, module)
        if isinstance(node, ast.ClassDef):
            return Found('class', node, module)
        alias = dotted(node.func if isinstance(node, ast.Call) else node)
        found = alias and self._resolve(alias, module)
        if isinstance(node, ast.Call):
            return Found('instance', found.node, found.home) if found and found.kind == 'class' else Found(
                'value', node, module)
        return found or Found('value', node, module)

    def _resolve(self, name, module):
        """Resolve a dotted name in that module's scope."""
        first, _, rest = name.partition('.')
        bound = self.bindings(module).get(first)
        if bound is None and not self.file_of(module + '.' + first):
            return OUTSIDE  # a built-in
        return self.look_up('.'.join(filter(None, (bound if isinstance(bound, str) else module + '.' + first, rest))))

    def _class_member(self, owner, name):
        inside = {}
        self._bind(owner.node.body, owner.home, inside)
        if isinstance(inside.get(name), FUNCTIONS):
            plain = any(dotted(d) == 'staticmethod' for d in inside[name].decorator_list)
            if any(dotted(d) == 'property' for d in inside[name].decorator_list):
                return Found('value', inside[name], owner.home)
            return Found('function' if plain else 'method', inside[name], owner.home)
        if name in inside:
            return Found('value', None, owner.home)
        for node in ast.walk(owner.node):
            if isinstance(node, ast.Attribute) and dotted(node) == 'self.' + name and isinstance(node.ctx, ast.Store):
                return Found('value', None, owner.home)
        for method in ('__getattr__', '__setattr__'):  # they compare known names with literals
            if method in inside and any(
                    isinstance(n, ast.Constant) and n.value == name for n in ast.walk(inside[method])):
                return Found('value', None, owner.home)
        unknown = None
        for base in owner.node.bases:
            parent = self._resolve(dotted(base), owner.home) if dotted(base) else OUTSIDE
            if parent is None or parent.kind != 'class':
                unknown = unknown if dotted(base) == 'object' else OUTSIDE
                continue
            found = self.member(parent, name)
            if found is OUTSIDE:
                unknown = OUTSIDE
            elif found:
                return found
        return unknown

    # ---- names that torch_npu adds to itself

    @property
    @functools.lru_cache(maxsize=None)  # noqa: B019  (there are three libraries, for as long as the tests run)
    def _injected(self):
        """Name to the dotted name that becomes torch_npu.<name>, or to '' where that isn't said."""
        found = {}
        for path in sorted(self.paths):
            if path.startswith('torch_npu/') and path.endswith('.py') and not path.startswith('torch_npu/onnx/'):
                text = self._read(path)
                if b'torch_npu.' not in text:
                    continue
                for name, value in re.findall(r'(?m)^[ \t]*torch_npu\.(\w+) = ([\w.]*)', text.decode('utf-8')):
                    found[name] = value if value.startswith('torch.ops.npu.') else found.get(name, '')
                if path.startswith('torch_npu/_init/'):
                    for name, home, there in re.findall(r'"(\w+)": \("([\w.]+)", "(\w+)"\)', text.decode('utf-8')):
                        found[name] = home + '.' + there
                    for name in re.findall(r'globals_dict\["(\w+)"\] = ', text.decode('utf-8')):
                        found.setdefault(name, '')
        return found

    @property
    @functools.lru_cache(maxsize=None)  # noqa: B019
    def _operators(self):
        """Name to the schemas of its overloads."""
        found = collections.defaultdict(list)
        for path in self.paths:
            if path.endswith('.yaml'):
                text = self._read(path).decode('utf-8')
                for name, schema in re.findall(r'(?m)func: (\w+)(?:\.\w+)?\((.*)\) ->', text):
                    found[name].append(schema)
        return found

    @functools.lru_cache(maxsize=None)  # noqa: B019
    def _is_compiled(self, name):
        # A linker may store a string as the tail of another, so any character may precede it.
        return any(name.encode() + b'\0' in self._binary(path) for path in sorted(self.paths)
                   if path.startswith(('torch_npu/_C.', 'torch_npu/lib/libtorch_npu')))

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _binary(self, path):
        return self._read(path)

    # ---- signatures

    def signatures(self, found):
        """[inspect.Signature, …], of which one must fit; None if the wheel has none."""
        if found.kind in ('function', 'method'):
            return [_signature(found.node, drop_first=found.kind == 'method')]
        if found.kind == 'operator':
            return [_schema_signature(schema) for schema in found.node]
        if found.kind == 'class':
            maker = self.member(found, '__init__')
            return self.signatures(maker) if maker and maker.kind == 'method' else None
        return None


def _signature(node, drop_first):
    args, kind, parameters = node.args, inspect.Parameter, []
    positional = getattr(args, 'posonlyargs', []) + args.args
    for index, arg in enumerate(positional):
        optional = index >= len(positional) - len(args.defaults)
        parameters.append(kind(arg.arg, kind.POSITIONAL_OR_KEYWORD if arg in args.args else kind.POSITIONAL_ONLY,
                               default=None if optional else kind.empty))
    if args.vararg:
        parameters.append(kind(args.vararg.arg, kind.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        parameters.append(kind(arg.arg, kind.KEYWORD_ONLY, default=kind.empty if default is None else None))
    if args.kwarg:
        parameters.append(kind(args.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters[1:] if drop_first else parameters)


def _schema_signature(schema):
    """Of an operator's schema, such as 'Tensor query, int head_num, *, float scale=1.'. A first `self` is `input`."""
    kind, parameters, how = inspect.Parameter, [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for part in re.split(r',\s*(?![^\[]*\])', schema):
        if part.strip() == '*':
            how = kind.KEYWORD_ONLY
        elif part:
            name, has_default, _ = part.partition('=')
            name = 'input' if name.split()[-1] == 'self' else name.split()[-1]
            parameters.append(kind(name, how, default=None if has_default else kind.empty))
    return inspect.Signature(parameters)


def refusal(signatures, positional, keywords, complete):
    """None if a signature accepts the call, else the last one's error. `complete`: the call has no * or **."""
    problem = None
    for signature in signatures:
        try:
            bind = signature.bind if complete else signature.bind_partial
            bind(*[None] * positional, **dict.fromkeys(keywords))
            return None
        except TypeError as error:
            problem = str(error)
    return problem
