"""Every name of torch_npu, torch.npu and apex that the project uses exists in the published torch_npu and accepts the
project's arguments. The emulator has no name that the real torch_npu lacks.

No NPU is needed: names are collected from the project's syntax trees and looked up in two wheels, the oldest supported
and the newest that requirements.txt allows. The audit follows imports, importlib.import_module, assignments, loops and
conditionals, getattr with a literal (also from a caller), project functions that return such a name, and
`getattr(torch, <type of a device>)`, which is torch.npu here. It doesn't follow dictionaries that are filled later,
decorators, and attributes of objects from a caller. A list below has those.
"""

import ast
import collections
import glob
import os
import re
import warnings
import zipfile

import pytest

import structure
import wheels
from helpers import ROOT, TEST_DIR, cannot_run
from wheels import FUNCTIONS, Library, dotted

pytestmark = pytest.mark.current_only

SHIPPED = [os.path.join(ROOT, path) for path in structure.product_files()]
EMULATOR = os.path.join(TEST_DIR, 'npu_emulator')
TRACKED = re.compile(r'(torch_npu|torch\.npu|apex)(\.|$)')
FOLLOWED = {'torch', 'torch_npu', 'apex', 'importlib'}
GUARDS = {'AttributeError', 'ImportError', 'ModuleNotFoundError', 'Exception', 'BaseException', None}

# There is no wheel of Ascend's apex. Its interface follows https://gitee.com/ascend/apex (README, patch/npu.patch,
# src/apex/optimizers/npu_fused_adamw.py), and https://github.com/NVIDIA/apex for master_params, state_dict, Fused*.
APEX = {
    'apex/__init__.py': 'from . import amp, optimizers',
    'apex/amp.py': '''
def initialize(models, optimizers=None, enabled=True, opt_level='O1', cast_model_type=None, patch_torch_functions=None,
               keep_batchnorm_fp32=None, master_weights=None, loss_scale=None, cast_model_outputs=None, num_losses=1,
               verbosity=1, dynamic_init_scale=2. ** 16, scale_growth_factor=2., scale_backoff_factor=0.5,
               scale_window=2000, min_loss_scale=None, max_loss_scale=2. ** 24, combine_grad=None, combine_ddp=None,
               ddp_replica_count=4, user_cast_preferred=None, check_combined_tensors=None): ...
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False): ...
def master_params(optimizer): ...
def state_dict(destination=None): ...
def load_state_dict(state_dict): ...
''',
    'apex/optimizers.py': '''
class NpuFusedAdamW:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False): ...
    def step(self, closure=None): ...
    def clip_optimizer_grad_norm_fused(self, max_norm, norm_type=2): ...  # amp.initialize puts it there
class FusedAdam:
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0., amsgrad=False, set_grad_none=True): ...
class FusedLAMB:
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False): ...
class FusedNovoGrad:
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.,
                 amsgrad=False, reg_inside_moment=False, grad_averaging=True, norm_type=2, init_zero=False,
                 set_grad_none=True): ...
class FusedSGD:
    def __init__(self, params, lr, momentum=0., dampening=0., weight_decay=0., nesterov=False,
                 wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False): ...
''',
}
APEX_FACTS = Library.from_texts('Ascend\'s apex', APEX)

# The project's calls of objects that it gets as arguments, which no syntax tree shows: name, number of positional
# arguments, keywords.
HANDED_OVER = [
    ('torch_npu.optim.NpuFusedAdamW', 1, ('lr', 'betas', 'eps', 'weight_decay')),
    ('apex.optimizers.NpuFusedAdamW', 1, ('lr', 'betas', 'eps', 'weight_decay')),
    ('apex.optimizers.FusedAdam', 1, ('lr', 'betas', 'eps', 'weight_decay', 'adam_w_mode')),
    ('apex.optimizers.FusedLAMB', 1, ('lr', 'betas', 'eps', 'weight_decay')),
    ('apex.optimizers.FusedNovoGrad', 1, ('lr', 'betas', 'eps', 'weight_decay')),
    ('apex.optimizers.FusedSGD', 1, ('lr', 'momentum', 'weight_decay', 'nesterov')),
    ('torch_npu.optim.NpuFusedAdamW().clip_grad_norm_fused_', 1, ()),
    ('torch_npu.optim.NpuFusedAdamW().step', 0, ()),
    ('torch_npu.optim.NpuFusedAdamW().zero_grad', 0, ('set_to_none',)),
    ('apex.optimizers.NpuFusedAdamW().clip_optimizer_grad_norm_fused', 1, ()),
]


# ---- what the project uses

Use = collections.namedtuple('Use', 'where names guarded')  # names: alternatives, at least one must exist
Call = collections.namedtuple('Call', 'where name positional keywords complete')


class Text(str):
    """A string literal in the code. A plain str is a dotted name."""


class Ours(str):
    """A module, function or class of the project: 'beit/devices/kernels', 'beit/devices/kernels.fused_optimizer'."""


Bag = collections.namedtuple('Bag', 'values')  # of a dictionary


class Scope:
    def __init__(self, outer=None, name='', owner=''):
        self.outer, self.name, self.owner, self.names = outer, name, owner, {}

    def get(self, name):
        return self.names[name] if name in self.names else self.outer.get(name) if self.outer else frozenset()

    def add(self, name, values):
        self.names[name] = self.names.get(name, frozenset()) | values


class Usage:
    """The tracked names in sources {file name: text}, after a few passes that propagate values."""

    PASSES = 4

    def __init__(self, sources):
        self.trees = {path: ast.parse(text, path) for path, text in sources.items()}
        self.modules = {(os.path.relpath(path, ROOT) if os.path.isabs(path) else path)[:-3]: path for path in sources}
        self.tops = {module: Scope(name=module) for module in self.modules}
        self.parameters, self.returns, self.defined = {}, {}, {}
        for _ in range(self.PASSES):
            self.uses, self.calls, self.probed, self.fused = [], [], set(), []
            for module, path in self.modules.items():
                self.path, self.guarded = os.path.relpath(path, ROOT) if os.path.isabs(path) else path, 0
                self.block(self.trees[path].body, self.tops[module])

    # statements

    def block(self, statements, scope):
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node, scope):
        if isinstance(node, FUNCTIONS):
            self.function(node, scope)
        elif isinstance(node, ast.ClassDef):
            name = scope.name + '.' + node.name
            self.defined[name] = node
            scope.add(node.name, frozenset([Ours(name)]))
            self.block(node.body, Scope(scope, name, name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self.imported(node, scope)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            values = self.value(node.value, scope)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.bind(target, values, scope)
        elif isinstance(node, ast.Return) and node.value is not None:
            self.returns[scope.name] = self.returns.get(scope.name, frozenset()) | self.value(node.value, scope)
        elif isinstance(node, ast.For):
            self.bind(node.target, elements(self.value(node.iter, scope)), scope)
            self.block(node.body + node.orelse, scope)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                values = self.value(item.context_expr, scope)
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, values, scope)
            self.block(node.body, scope)
        elif isinstance(node, ast.Try):
            caught = {dotted(kind) if kind is not None else None for handler in node.handlers for kind in (
                handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type])}
            self.guarded += bool(caught & GUARDS)
            self.block(node.body, scope)
            self.guarded -= bool(caught & GUARDS)
            self.block([s for handler in node.handlers for s in handler.body] + node.orelse + node.finalbody, scope)
        else:
            for field in ast.iter_child_nodes(node):
                if isinstance(field, ast.stmt):
                    self.statement(field, scope)
                elif isinstance(field, ast.expr):
                    self.value(field, scope)

    def function(self, node, scope):
        name = scope.name + '.' + node.name
        self.defined[name] = node
        scope.add(node.name, frozenset([Ours(name)]))
        for default in node.decorator_list + node.args.defaults + [d for d in node.args.kw_defaults if d]:
            self.value(default, scope)
        inner = Scope(scope, name, scope.owner)
        for parameter, values in self.parameters.get(name, {}).items():
            inner.add(parameter, values)
        self.block(node.body, inner)

    def imported(self, node, scope):
        for alias in node.names:
            name = alias.name if isinstance(node, ast.Import) else (node.module or '') + '.' + alias.name
            self.use(node, [name])
            if isinstance(node, ast.Import) and not alias.asname:
                name = name.partition('.')[0]
            module, _, last = name.replace('.', '/').rpartition('/')
            if name.replace('.', '/') in self.modules:
                values = frozenset([Ours(name.replace('.', '/'))])
            elif module in self.modules:
                values = frozenset([Ours(module + '.' + last)])
            else:  # results of other packages are not followed
                values = frozenset([name] if name.partition('.')[0] in FOLLOWED else [])
            scope.add(alias.asname or name.rpartition('.')[2] or name, values)

    def bind(self, target, values, scope):
        if isinstance(target, ast.Name):
            scope.add(target.id, values)
        elif isinstance(target, ast.Attribute):
            if dotted(target) == 'self.' + target.attr and scope.owner:
                self.tops[scope.owner.partition('.')[0]].add(scope.owner + '.' + target.attr, values)
            else:
                self.value(target.value, scope)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for index, part in enumerate(target.elts):
                self.bind(part, frozenset().union(*[v[index] for v in values if type(v) is tuple
                                                    and len(v) == len(target.elts)]), scope)

    # expressions: their possible values, as a set of dotted names, Text, Ours, tuples and Bags

    def value(self, node, scope):
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Constant):
            return frozenset([Text(node.value)]) if isinstance(node.value, str) else frozenset()
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope)
        if isinstance(node, ast.Call):
            return self.call(node, scope)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return frozenset([tuple(self.value(e, scope) for e in node.elts)])
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if key is not None:
                    self.value(key, scope)
            return frozenset([Bag(frozenset().union(*[self.value(v, scope) for v in node.values]))])
        if isinstance(node, ast.IfExp):
            self.value(node.test, scope)
            return self.value(node.body, scope) | self.value(node.orelse, scope)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*[self.value(v, scope) for v in node.values])
        if isinstance(node, ast.Subscript):
            return self.subscript(node, scope)
        if isinstance(node, ast.Lambda):
            self.value(node.body, Scope(scope, scope.name + '.<lambda>', scope.owner))
            return frozenset()
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            return self.comprehension(node, scope)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.expr, ast.keyword)):
                self.value(child.value if isinstance(child, ast.keyword) else child, scope)
        return frozenset()

    def attribute(self, node, scope):
        if dotted(node) == 'self.' + node.attr and scope.owner:
            return self.tops[scope.owner.partition('.')[0]].get(scope.owner + '.' + node.attr)
        result = set()
        bases = self.value(node.value, scope)
        for base in bases:
            if isinstance(base, Ours):
                result |= self.tops[base].get(node.attr) if base in self.tops else frozenset()
            elif type(base) is str:
                result.add(base + '.' + node.attr)
        self.use(node, [name for name in result if type(name) is str])
        if re.search('(^|_)fused', node.attr) and not bases:
            self.fused.append((node, self.path, node.attr))
        return frozenset(result)

    def subscript(self, node, scope):
        values, index = self.value(node.value, scope), getattr(node.slice, 'value', node.slice)  # an Index in 3.8
        index = getattr(index, 'value', index)
        self.value(node.slice, scope)
        if isinstance(index, int):
            return frozenset().union(*[v[index] for v in values if type(v) is tuple and -len(v) <= index < len(v)])
        return elements(values)

    def comprehension(self, node, scope):
        inner = Scope(scope, scope.name, scope.owner)
        for generator in node.generators:
            self.bind(generator.target, elements(self.value(generator.iter, inner)), inner)
            for condition in generator.ifs:
                self.value(condition, inner)
        if isinstance(node, ast.DictComp):
            self.value(node.key, inner)
            return frozenset([Bag(self.value(node.value, inner))])
        return frozenset([(self.value(node.elt, inner),)])

    def call(self, node, scope):
        functions = self.value(node.func, scope)
        arguments = [self.value(a.value if isinstance(a, ast.Starred) else a, scope) for a in node.args]
        keywords = {k.arg: self.value(k.value, scope) for k in node.keywords}
        name = dotted(node.func)
        if name == 'hasattr' and len(arguments) == 2:
            for probe in self.attributes(arguments[0], arguments[1]):
                self.probed.add(probe)
                self.use(node, [probe], guarded=True)
            for attribute in arguments[1]:
                if re.search('(^|_)fused', attribute) and not any(type(base) is str for base in arguments[0]):
                    self.fused.append((node, self.path, str(attribute)))
            return frozenset()
        if name == 'getattr' and len(arguments) >= 2:
            return self.getattr(node, arguments)
        result = set()
        for function in functions:
            if function in ('importlib.import_module', '__import__', 'importlib.util.find_spec'):
                found = [str(text) for text in arguments[0] if isinstance(text, Text)]
                for module in found:
                    self.use(node, [module], guarded=function.endswith('find_spec'))
                result |= set(found) if not function.endswith('find_spec') else set()
            elif isinstance(function, Ours):
                result |= self.call_ours(function, arguments, keywords)
            elif type(function) is str:
                if TRACKED.match(function):
                    names, complete = self.keywords(node, scope)
                    self.calls.append(Call(self.where(node), function, len(arguments), names, complete))
                result.add(function + '()')
        if name in ('list', 'tuple', 'set', 'sorted', 'iter', 'next', 'reversed') and arguments:
            result |= arguments[0] if name != 'next' else elements(arguments[0])
        return frozenset(r for r in result if type(r) is not str or r.count('()') < 3)

    def getattr(self, node, arguments):
        guarded = len(arguments) == 3
        wanted = [name for name in arguments[1] if isinstance(name, Text)]
        by_type = any(isinstance(n, (ast.Attribute, ast.Constant)) and 'type' in (
            getattr(n, 'attr', None), getattr(n, 'value', None)) for n in ast.walk(node.args[1]))
        if not wanted or by_type and 'torch' in arguments[0]:
            return frozenset(['torch.npu'] if 'torch' in arguments[0] and by_type else []) | frozenset(
                arguments[2] if guarded else [])
        found = set()
        for name in wanted:
            alternatives = self.attributes(arguments[0], [name])
            self.use(node, alternatives, guarded)
            self.probed.update(alternatives if guarded else [])
            found.update(alternatives)
        return frozenset(found)

    def attributes(self, bases, names):
        return sorted(base + '.' + name for base in bases if type(base) is str for name in names
                      if isinstance(name, Text))

    def call_ours(self, function, arguments, keywords):
        node = self.defined.get(function)
        if isinstance(node, ast.ClassDef):
            function, arguments = function + '.__init__', [frozenset()] + arguments
            node = self.defined.get(function)
        if node is None:
            return frozenset()
        known = self.parameters.setdefault(function, {})
        given = dict(zip([a.arg for a in node.args.args], arguments), **{k: v for k, v in keywords.items() if k})
        for name, values in given.items():
            known[name] = known.get(name, frozenset()) | values
        return self.returns.get(function, frozenset())

    def keywords(self, node, scope):
        """(names, complete) of a call's keywords, including ** of a dictionary that the same function builds."""
        names, complete = set(), not any(isinstance(a, ast.Starred) for a in node.args)
        for keyword in node.keywords:
            if keyword.arg:
                names.add(keyword.arg)
                continue
            complete = False
            variable, function = dotted(keyword.value), self.defined.get(scope.name)
            for step in ast.walk(function) if function is not None and variable else []:
                if not isinstance(step, ast.Assign):
                    continue
                target, value = step.targets[0], step.value
                if dotted(target) == variable and isinstance(value, ast.Call) and dotted(value.func) == 'dict':
                    names |= {k.arg for k in value.keywords if k.arg}
                elif isinstance(target, ast.Subscript) and dotted(target.value) == variable:
                    names |= {n.value for n in ast.walk(target.slice) if isinstance(n, ast.Constant)}
        return tuple(sorted(names)), complete

    def where(self, node):
        return '%s:%d' % (self.path, node.lineno)

    def use(self, node, names, guarded=False):
        names = [name for name in names if TRACKED.match(name)]
        if names:
            self.uses.append(Use(self.where(node), tuple(sorted(names)), guarded or self.guarded > 0))


def elements(values):
    """The possible elements of these values, in a loop or subscript."""
    return frozenset().union(*[frozenset().union(*v) if type(v) is tuple else v.values if isinstance(v, Bag)
                               else frozenset() for v in values])


def project():
    sources = {}
    for path in SHIPPED:
        with open(path, encoding='utf-8') as file:
            sources[path] = file.read()
    return Usage(sources)


# ---- the audit

def look_up(library, name):
    return (APEX_FACTS if name.split('.')[0] == 'apex' else library).look_up(name)


def first_absent(library, name):
    """The shortest part of a dotted name that the library lacks, or None."""
    parts = name.split('.')
    for length in range(1, len(parts) + 1):
        part = '.'.join(parts[:length])
        if part != 'torch' and look_up(library, part) is None:
            return part
    return None


def absent_names(usage, libraries):
    """One line for each name that is missing from any wheel, or, for a guarded use, from all wheels."""
    problems = []
    for use in usage.uses:
        lacking = {}
        for library in libraries:
            absent = [first_absent(library, name) for name in use.names]
            if None not in absent:
                lacking[library.name] = absent[0]
        guarded = use.guarded or all(name in usage.probed for name in lacking.values())
        if lacking and (not guarded or len(lacking) == len(libraries)):
            for name, absent in sorted(lacking.items()):
                problems.append('%s: %s is not in %s' % (
                    use.where, absent, name if TRACKED.match(absent).group(1) != 'apex' else APEX_FACTS.name))
    return sorted(set(problems))


def refused_calls(calls, libraries):
    """(one line for each call that a wheel refuses, one for each that couldn't be checked)."""
    problems, unchecked = set(), set()
    for call in calls:
        for library in libraries:
            found = look_up(library, call.name)
            if found is None or found is wheels.OUTSIDE and '()' in call.name:
                continue  # `absent_names` reports it, or it's the result of a call, which is unknown
            name = APEX_FACTS.name if call.name.startswith('apex') else library.name
            signatures = (APEX_FACTS if call.name.startswith('apex') else library).signatures(found)
            if not signatures:
                unchecked.add('NOT CHECKED: %s: the arguments of %s, of which %s says nothing' % (
                    call.where, call.name, name))
                continue
            refused = wheels.refusal(signatures, call.positional, call.keywords, call.complete)
            if refused:
                problems.add('%s: %s of %s: %s' % (call.where, call.name, name, refused))
    return sorted(problems), sorted(unchecked)


@pytest.fixture(scope='module')
def libraries():
    with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as file:
        requirements = file.read()
    try:
        return wheels.wheels(requirements)
    except (wheels.OutOfReach, OSError) as error:
        return cannot_run('registry', 'the audit against the real torch_npu: %s' % error)


@pytest.fixture(scope='module')
def usage():
    usage = project()
    for name, positional, keywords in HANDED_OVER:
        usage.uses.append(Use('handed over', (name,), False))
        usage.calls.append(Call('handed over', name, positional, keywords, True))
    return usage


def test_names_that_the_project_uses_exist(usage, libraries):
    assert not absent_names(usage, libraries), '\n' + '\n'.join(absent_names(usage, libraries))


def test_calls_that_the_project_makes_are_accepted(usage, libraries):
    problems, unchecked = refused_calls(usage.calls, libraries)
    for line in unchecked:
        warnings.warn(line, stacklevel=2)
    assert not problems, '\n' + '\n'.join(problems)


def test_methods_of_fused_optimizers_exist(usage, libraries):
    """The project checks an optimizer for clip_grad_norm_fused_ and others; at least one optimizer must have each."""
    unknown = []
    for node, path, name in usage.fused:
        real = [library.look_up('torch_npu.optim.NpuFusedAdamW().' + name) for library in libraries]
        real.append(APEX_FACTS.look_up('apex.optimizers.NpuFusedAdamW().' + name))
        if not any(found and found.kind == 'method' for found in real):
            unknown.append('%s:%d: no NpuFusedAdamW has %s' % (path, node.lineno, name))
    assert not unknown, '\n' + '\n'.join(unknown)


def test_the_audit_finds_names_reached_in_every_way(usage):
    """Otherwise an audit that finds nothing would pass: one name for each way that it follows."""
    seen = {name for use in usage.uses for name in use.names}
    assert {'torch_npu', 'torch.npu', 'torch.npu.is_available', 'torch.npu.device_count', 'torch.npu.set_device',
            'torch.npu.manual_seed_all', 'torch_npu.profiler.profile', 'torch_npu.profiler.ProfilerActivity.NPU',
            'torch_npu.optim.NpuFusedAdamW', 'apex.optimizers.NpuFusedAdamW', 'apex.amp.initialize',
            'apex.amp.scale_loss', 'apex.amp.master_params'} <= seen
    assert {'clip_grad_norm_fused_', 'clip_optimizer_grad_norm_fused'} <= {name for _, _, name in usage.fused}
    initialize = [call for call in usage.calls if call.name == 'apex.amp.initialize']
    assert initialize and {'opt_level', 'loss_scale', 'combine_grad'} <= set(initialize[0].keywords)


def named_devices(tree):
    """Line numbers where code, not a message, names torch.npu, torch.cuda, torch_npu or apex."""
    rooms = re.compile(r'(torch_npu|apex|torch\.npu|torch\.cuda)(\.|$)')
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or '') + '.' + alias.name for alias in node.names]
        elif isinstance(node, (ast.Attribute, ast.Name)):
            names = [dotted(node) or '']
        elif isinstance(node, ast.Call) and (dotted(node.func) or '').rpartition('.')[2] in (
                'import_module', '__import__', 'find_spec', 'hasattr', 'getattr'):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [(dotted(node.args[0]) + '.' if dotted(node.args[0]) else '') + text for text in texts]
        if any(rooms.match(name) for name in names):
            yield node.lineno


def test_only_devices_names_npu_cuda_and_apex(usage):
    lines = {os.path.relpath(path, ROOT): list(named_devices(tree)) for path, tree in usage.trees.items()}
    assert sum(path.startswith('beit/devices/') and bool(found) for path, found in lines.items()) > 2
    elsewhere = ['%s:%d' % (path, line) for path, found in lines.items() if not path.startswith('beit/devices/')
                 for line in found]
    assert not elsewhere, 'only beit/devices may name them: ' + ', '.join(elsewhere)


# ---- the doubles

# Names that only the emulator has. Capitals are its settings, an underscore marks private names.
EMULATOR_ONLY = ('torch_npu.load_extension', 'torch_npu.attention')


def surface(library, top):
    """(dotted name, syntax tree or None) of everything public in a package: functions, classes, methods, values."""
    for path in sorted(library.paths):
        module = re.sub(r'(/__init__)?\.py$', '', path).replace('/', '.')
        if not path.endswith('.py') or module.split('.')[0] != top or '._' in module:
            continue
        yield module, None
        for name, bound in library.bindings(module).items():
            if name.startswith('_') or name.isupper():
                continue
            is_sibling = isinstance(bound, str) and library.file_of(bound) and bound != module + '.' + name
            if isinstance(bound, ast.AST) or bound.startswith(top + '.') and not is_sibling:
                yield module + '.' + name, bound
            if isinstance(bound, ast.ClassDef):
                for item in bound.body:
                    if isinstance(item, FUNCTIONS) and not item.name.startswith('_'):
                        yield module + '.' + name + '().' + item.name, item


def parameters(library, name):
    """The parameter names of a function or class; None if unknown or if it takes any keyword."""
    found = library.look_up(name)
    signatures = library.signatures(found) if found else None
    if not signatures or any(p.kind == p.VAR_KEYWORD for s in signatures for p in s.parameters.values()):
        return None
    return {p.name for s in signatures for p in s.parameters.values() if p.kind != p.VAR_POSITIONAL}


def too_generous(double, top, libraries, excepted=()):
    """One line for each public name or parameter of the double that no library has."""
    problems = []
    everyone = ', '.join(library.name for library in libraries)
    for name, _ in surface(double, top):
        if any((name + '.').startswith(own + '.') for own in excepted):
            continue
        real = [library for library in libraries if library.look_up(name)]
        if not real:
            problems.append('%s is public in the double, but in none of %s' % (name, everyone))
            continue
        mine, theirs = parameters(double, name), [parameters(library, name) for library in real]
        if mine and None not in theirs and mine - set().union(*theirs):
            problems.append('%s of the double takes %s, but none of %s does' % (
                name, ', '.join(sorted(mine - set().union(*theirs))), everyone))
    return problems


def test_tests_import_neither_each_other_nor_conftest():
    """Shared functions are in helpers.py; pytest injects fixtures by name."""
    for path in glob.glob(os.path.join(TEST_DIR, '**', '*.py'), recursive=True):
        with open(path, encoding='utf-8') as file:
            imported = re.findall(r'^ *(?:from|import) (conftest|test_\w+|cases_\w+)', file.read(), re.MULTILINE)
        assert set(imported) <= {os.path.basename(path)[:-3]}, path  # a test may import itself in a process


def test_emulator_has_nothing_that_torch_npu_lacks(libraries):
    emulator = Library.from_folder(EMULATOR, 'the emulator')
    assert len(list(surface(emulator, 'torch_npu'))) > 50
    problems = too_generous(emulator, 'torch_npu', libraries, EMULATOR_ONLY)
    assert not problems, '\n' + '\n'.join(problems)


def test_apex_double_has_the_interface_of_ascends():
    folder = os.path.join(EMULATOR, 'apex_ascend')
    double = Library.from_folder(folder, 'the double')
    texts = ''.join(double._read(path).decode('utf-8') for path in sorted(double.paths))
    methods = {node.name: node for node in ast.walk(ast.parse(texts)) if isinstance(node, FUNCTIONS)}
    needed = {'apex.amp.initialize': {'opt_level', 'loss_scale', 'combine_grad'},
              'apex.amp.scale_loss': {'loss', 'optimizers', 'delay_unscale'}, 'apex.amp.master_params': {'optimizer'},
              'apex.amp.state_dict': set(), 'apex.amp.load_state_dict': set(),
              'apex.optimizers.NpuFusedAdamW': {'params', 'lr', 'betas', 'eps', 'weight_decay'}}
    for name, arguments in needed.items():
        assert arguments <= (parameters(double, name) or set()), '%s of the double lacks some of %s' % (name, arguments)
        assert arguments <= parameters(APEX_FACTS, name)
    assert 'max_norm' in [a.arg for a in methods['clip_optimizer_grad_norm_fused'].args.args]
    positional = {'apex.amp.load_state_dict'}  # takes one positional argument
    assert not too_generous(double, 'apex', [APEX_FACTS], positional)


# ---- the audit itself

FAKE_WHEEL = {
    'torch_npu/__init__.py': 'import torch_npu.npu\nfrom torch_npu import profiler\n',
    'torch_npu/npu/__init__.py': 'from .npu_config import *\nfrom .amp import *\n',
    'torch_npu/npu/npu_config.py': '__all__ = ["set_compile_mode"]\ndef set_compile_mode(jit_compile=False): ...\n'
                                   'def hidden(): ...\n',
    'torch_npu/npu/amp.py': 'class autocast:\n    def __init__(self, enabled=True): ...\n',
    'torch_npu/profiler.py': 'class profile:\n    def __init__(self, *, activities=None): ...\n'
                             '    def step(self): ...\n',
    'torch_npu/utils/__init__.py': '',
    'torch_npu/utils/custom_ops.py': 'torch_npu.npu_op = torch.ops.npu.npu_op\n',
    'torch_npu/ops.yaml': '- func: npu_op(Tensor self, int head_num, *, float scale=1., int[2] a=[0, 0]) -> Tensor\n',
}
RIGHT = '''
import torch, importlib
def _module(device):
    return getattr(torch, getattr(device, 'type', device), None)
def set_mode(device):
    _module(device).set_compile_mode(jit_compile=True)
    with _module(device).autocast(enabled=False):
        pass
    if hasattr(_module(device), 'set_compile_mode'):
        torch.npu.set_compile_mode(False)
torch_npu = importlib.import_module('torch_npu')
with torch_npu.profiler.profile(activities=[]) as p:
    p.step()
torch_npu.npu_op(1, head_num=2, scale=1., a=[1, 2])
'''
WRONG = {
    'torch.npu.no_such_thing()': 'torch.npu.no_such_thing is not in',
    'torch.npu.hidden()': 'torch.npu.hidden is not in',
    '_module("npu").no_such_thing': 'torch.npu.no_such_thing is not in',
    'hasattr(torch.npu, "no_such_thing")': 'torch.npu.no_such_thing is not in',
    'from torch_npu.npu import no_such_thing': 'torch_npu.npu.no_such_thing is not in',
    'getattr(importlib.import_module("torch_npu.profiler"), "no_such_thing")': 'torch_npu.profiler.no_such_thing',
    'p.no_such_step()': 'torch_npu.profiler.profile().no_such_step is not in',
    'importlib.import_module("apex.amp").no_such_thing': 'apex.amp.no_such_thing is not in Ascend\'s apex',
    'torch.npu.set_compile_mode(jit=True)': 'torch.npu.set_compile_mode of fake: got an unexpected keyword',
    'torch.npu.set_compile_mode(True, True)': 'torch.npu.set_compile_mode of fake: too many positional',
    'torch_npu.profiler.profile(activity=[])': 'torch_npu.profiler.profile of fake: got an unexpected keyword',
    'torch_npu.npu_op(1, 2, pse=None)': 'torch_npu.npu_op of fake: got an unexpected keyword',
    'torch_npu.npu_op(1)': 'torch_npu.npu_op of fake: missing a required argument',
}


def complaints(source, libraries):
    usage = Usage({'fake.py': source})
    return absent_names(usage, libraries) + refused_calls(usage.calls, libraries)[0]


def fake_library(path):
    with zipfile.ZipFile(str(path), 'w') as archive:
        for name, text in FAKE_WHEEL.items():
            archive.writestr(name, text)
    return Library.from_wheel(str(path), 'fake')


def test_the_audit_accepts_correct_code(tmp_path):
    assert complaints(RIGHT, [fake_library(tmp_path / 'fake.whl')]) == []


@pytest.mark.parametrize('line', WRONG)
def test_the_audit_reports_errors(line, tmp_path):
    found = complaints(RIGHT + line + '\n', [fake_library(tmp_path / 'fake.whl')])
    assert len(found) == 1 and found[0].startswith('fake.py:%d: ' % (RIGHT.count('\n') + 1)), found
    assert WRONG[line] in found[0]


def test_the_audit_knows_the_real_wheels(libraries):
    """The same checks on real wheels detect a changed layout."""
    source = ('import torch\nimport torch_npu\ntorch.npu.no_such_thing()\ntorch.npu.set_compile_mode(jit=True)\n'
              'torch_npu.npu_no_such_operator()\ntorch_npu.npu_fusion_attention(1, 1, 1, 12, "BNSD", psi=None)\n'
              'torch_npu.npu_fusion_attention(1, 1, 1, 12, "BNSD", pse=None, scale=1., keep_prob=1.)\n'
              'torch_npu.profiler.profile().no_such_step()\ntorch_npu.profiler.ProfilerActivity.NO_SUCH_ACTIVITY\n')
    for library in libraries:
        lines = [int(line.split(':')[1]) for line in complaints(source, [library])]
        assert sorted(lines) == [3, 4, 5, 6, 8, 9], (library.name, complaints(source, [library]))


def test_a_guarded_name_may_be_missing_in_one_wheel(tmp_path):
    fake = fake_library(tmp_path / 'fake.whl')
    newer = Library.from_texts('newer', dict(FAKE_WHEEL, **{'torch_npu/npu/amp.py': 'def later(): ...\n'}))
    probe = 'import torch\nif hasattr(torch.npu, "later"):\n    torch.npu.later()\n'
    assert complaints(probe, [fake, newer]) == []
    plain = 'import torch\ntorch.npu.later()\n'
    assert complaints(plain, [fake, newer]) == ['fake.py:2: torch.npu.later is not in fake']
    assert len(complaints(probe, [fake])) == 2
    tried = 'import torch\ntry:\n    torch.npu.later()\nexcept AttributeError:\n    pass\n'
    assert complaints(tried, [fake, newer]) == [] and len(complaints(tried, [fake])) == 1


def test_extra_names_in_doubles_are_reported(tmp_path):
    double = Library.from_texts('double', dict(FAKE_WHEEL, **{
        'torch_npu/npu/npu_config.py': '__all__ = ["set_compile_mode", "more"]\nimport os\nLIMIT = 1\n'
                                       'def set_compile_mode(jit_compile=False, fast=True): ...\ndef more(): ...\n'}))
    problems = too_generous(double, 'torch_npu', [fake_library(tmp_path / 'fake.whl')])
    assert len(problems) == 2 + 2 and any('takes fast' in problem for problem in problems), problems


def test_devices_named_elsewhere_are_reported():
    lines = ('import torch\nimport torch_npu\nfrom apex import amp\ntorch.npu.synchronize()\nx = torch.cuda\n'
             'importlib.import_module("torch_npu.optim")\nhasattr(torch, "npu")\n')
    assert sorted(set(named_devices(ast.parse(lines)))) == [2, 3, 4, 5, 6, 7]
    assert not list(named_devices(ast.parse('say("install torch_npu or apex")\nstate["apex"] = dict(apex=1)\n')))


def test_the_newest_wheels_that_fit():
    listed = ['2.14.0', '2.12.0.post2', '2.12.0.post10', '2.9.1', '2.13.0', '2.12.0rc1', '2.1.0.post17', '1.11.0']
    assert wheels.newest(listed, '# torch\ntorch>=2.1,<2.13\ntimm>=1\n') == ['2.9.1', '2.12.0.post10']
    assert wheels.newest(listed, 'torch>=2.1,<2.15') == ['2.13.0', '2.14.0']
    assert wheels.newest(['2.0.1'], 'torch>=2.1,<2.13') == []
