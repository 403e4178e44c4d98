#!/usr/bin/env python3
"""Count the structure of the product code: modules, lines, imports, circles, long functions.

    python tests/structure.py             # modules, lines, import edges, longest functions
    python tests/structure.py --untyped   # public functions and methods that lack an annotation

test_structure.py holds the code to the rules of docs/architecture.md with the same functions.
"""

import ast
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The packages and modules of beit/, top first: each may import those below it.
LAYERS = ('cli', 'parser', 'classifier', 'outputs', 'training', 'checkpoint', 'weights', 'model_spec', 'data', 'files',
          'log', 'distributed', 'devices', 'config', 'recipes', 'paths', 'startup', 'errors')


def product_files(root=ROOT):
    """Paths of the product's Python files, relative to `root`."""
    found = sorted(name for name in os.listdir(root) if name.endswith('.py'))
    for folder, _, names in sorted(os.walk(os.path.join(root, 'beit'))):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(names) if name.endswith('.py')]
    return found


def module_name(path):
    """'beit/data/loader.py' is the module beit.data.loader, 'beit/__init__.py' the package beit."""
    name = path[:-len('.py')].replace(os.sep, '.')
    return name[:-len('.__init__')] if name.endswith('.__init__') else name


def parse(path, root=ROOT):
    with open(os.path.join(root, path), encoding='utf-8') as file:
        return ast.parse(file.read(), path)


def imported_modules(tree, modules):
    """The names of project modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = '%s.%s' % (node.module, alias.name)
                found.add(inner if inner in modules else node.module)
    return found & set(modules)


def import_graph(root=ROOT):
    """{module: sorted project modules that it imports}, without packages that have no code."""
    files = {module_name(path): path for path in product_files(root)}
    return {module: sorted(imported_modules(parse(path, root), files) - {module}) for module, path in files.items()}


def circles(graph):
    """Groups of modules that import one another in a circle (strongly connected components, Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module):]
            del stack[stack.index(module):]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def layer(module):
    """The place of a module in `LAYERS`, or None for a module of the root."""
    parts = module.split('.')
    return LAYERS.index(parts[1]) if parts[0] == 'beit' and len(parts) > 1 else None


def functions(tree):
    """(name, lines without docstring, number of parameters without self) of every function."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        names = [each.arg for each in getattr(node.args, 'posonlyargs', []) + node.args.args + node.args.kwonlyargs]
        yield node.name, lines, len(names) - (names[:1] in (['self'], ['cls']))


def untyped(tree):
    """(line, name, what lacks an annotation) of each public function, and each public method of a public class."""
    for node in ast.iter_child_nodes(tree):
        if getattr(node, 'name', '_').startswith('_'):
            continue
        if isinstance(node, ast.ClassDef):
            yield from ((line, '%s.%s' % (node.name, name), lacks) for line, name, lacks in untyped(node))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
            lacks = [each.arg for each in every if each is not None and each.annotation is None]
            if isinstance(tree, ast.ClassDef) and lacks[:1] in (['self'], ['cls']):
                del lacks[0]
            lacks += ['return'] if node.returns is None else []
            if lacks:
                yield node.lineno, node.name, lacks


def foreign_assignments(tree, modules):
    """Line numbers where a file assigns to a global of another project module."""
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {alias.asname or alias.name for alias in node.names
                        if '%s.%s' % (node.module, alias.name) in modules}
    for node in ast.walk(tree):
        for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
            for each in ast.walk(target) if isinstance(target, ast.AST) else ():
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) \
                        and isinstance(each.value, ast.Name) and each.value.id in aliases:
                    yield each.lineno


def lines_of(paths, root=ROOT):
    total = 0
    for path in paths:
        with open(os.path.join(root, path), encoding='utf-8') as file:
            total += sum(1 for _ in file)
    return total


def main():
    files, graph = product_files(), import_graph()
    if sys.argv[1:] == ['--untyped']:
        for path in files:
            for line, name, lacks in untyped(parse(path)):
                print('%s:%d: %s: %s' % (path, line, name, ', '.join(lacks)))
        return 0
    every = [(lines, path, name, parameters) for path in files for name, lines, parameters in functions(parse(path))]
    tests = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, stdout=subprocess.PIPE, universal_newlines=True,
                           check=True).stdout.split()
    tests = [path for path in tests if path not in files]
    print('modules at the root     %d' % sum(os.sep not in path for path in files))
    print('modules in all          %d' % len(files))
    print('lines of product        %d' % lines_of(files))
    print('lines of tests and more %d' % lines_of(tests))
    print('import edges            %d' % sum(map(len, graph.values())))
    print('import circles          %d%s' % (len(circles(graph)), ''.join('\n  ' + ' '.join(each)
                                                                         for each in circles(graph))))
    print('longest functions       %s' % ', '.join('%s:%s %d' % (path, name, lines)
                                                   for lines, path, name, _ in sorted(every, reverse=True)[:5]))
    print('most parameters         %s' % ', '.join('%s:%s %d' % (path, name, count) for _, path, name, count in sorted(
        every, key=lambda each: -each[3])[:5]))
    return 0


if __name__ == '__main__':
    sys.exit(main())
