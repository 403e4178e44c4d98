"""The structure that CONTRIBUTING.md describes: the files' places and the direction of imports."""

import ast
import os

from structure import (
    LAYERS,
    ROOT,
    circles,
    foreign_assignments,
    functions,
    import_graph,
    layer,
    module_name,
    parse,
    product_files,
    untyped,
)

ROOT_MODULES = {'run_class_finetuning', 'run_linear_eval', 'run_predict', 'run_export', 'average_checkpoints',
                'engine_for_finetuning', 'modeling_finetune', 'datasets', 'optim_factory', 'utils', 'flags',
                'check_flags'}
# The constructors of the network have the reference's parameters.
REFERENCES_OWN = {('modeling_finetune.py', '__init__')}


def test_the_root_holds_the_programs_and_the_references_modules():
    found = {module_name(path) for path in product_files() if os.sep not in path}
    assert found == ROOT_MODULES and len(found) <= 12


def test_imports_point_one_way():
    for module, imported in import_graph().items():
        if layer(module) is None:
            continue
        for other in imported:
            assert other == 'modeling_finetune' or other == 'beit' or layer(other) is not None, \
                '%s imports %s, a module of the root' % (module, other)
            if layer(other) is not None:
                assert layer(other) >= layer(module), '%s imports %s, which is above it: %s' % (
                    module, other, ' > '.join(LAYERS))


def test_modules_do_not_import_one_another_in_a_circle():
    assert circles(import_graph()) == []
    assert circles({'a': ['b'], 'b': ['c'], 'c': ['b']}) == [['b', 'c']]  # a circle is detected


def test_the_network_imports_nothing_of_ours():
    assert import_graph()['modeling_finetune'] == []


def test_no_module_assigns_to_the_globals_of_another():
    modules = set(import_graph())
    found = ['%s:%d' % (path, line) for path in product_files() for line in foreign_assignments(parse(path), modules)]
    assert found == []


def test_functions_are_short_and_take_few_parameters():
    limits = {'main': 45}
    for path in product_files():
        for name, lines, parameters in functions(parse(path)):
            assert lines <= limits.get(name, 70), '%s: %s has %d lines' % (path, name, lines)
            assert parameters <= 9 or (path, name) in REFERENCES_OWN, \
                '%s: %s has %d parameters' % (path, name, parameters)


def test_public_functions_have_type_annotations():
    """mypy requires all annotations of a function or none. `python tests/structure.py --untyped` lists missing ones."""
    found = ['%s:%d: %s: %s' % (path, line, name, ', '.join(lacks)) for path in product_files()
             for line, name, lacks in untyped(parse(path))]
    assert found == []
    seen = ast.parse('class A:\n    def b(self, c, *d: int) -> None: pass\n    def _e(f): pass\ndef g(h: int): pass')
    assert list(untyped(seen)) == [(2, 'A.b', ['c']), (4, 'g', ['return'])]


def test_the_project_is_self_contained():
    """No file has a machine's paths, and every package has an `__init__.py` that describes its content."""
    for folder, _, names in os.walk(os.path.join(ROOT, 'beit')):
        if '__pycache__' not in folder:
            assert '__init__.py' in names, folder
