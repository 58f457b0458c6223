"""The lints find what they are for: each violation is planted in a temporary tree."""

import pathlib
import tempfile
import unittest

import layers
import lifetimes
import registries


class Tree(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


class Layers(Tree):
    def test_upward_include_is_found(self):
        self.write("kernels/a.cc", '#include "engine/operation.h"\n')
        self.assertEqual(len(layers.check(self.root)), 1)

    def test_concrete_policy_from_engine_is_found(self):
        self.write("engine/a.cc", '#include "engine/policies/tova_policy.h"\n')
        self.assertEqual(len(layers.check(self.root)), 1)

    def test_wire_types_outside_the_edge_are_found(self):
        self.write("service/memory/a.cc", '#include "keepset/v1/common.pb.h"\n')
        self.assertEqual(len(layers.check(self.root)), 1)

    def test_third_party_in_the_wrong_room_is_found(self):
        self.write("engine/a.cc", "#include <hwy/highway.h>\n")
        self.assertEqual(len(layers.check(self.root)), 1)

    def test_cuda_switch_outside_lists_is_found(self):
        self.write("engine/a.cc", "#ifdef KEEPSET_HAS_CUDA\n#endif\n")
        self.assertEqual(len(layers.check(self.root)), 1)

    def test_downward_includes_pass(self):
        self.write("engine/a.cc", '#include "tables/decision_table.h"\n#include "base/clock.h"\n')
        self.assertEqual(layers.check(self.root), [])


class Lifetimes(Tree):
    def test_range_over_a_temporary_is_found(self):
        self.write("service/a.cc", "for (const auto& [name, line] : registry_.View()->lines) {}\n")
        self.assertEqual(len(lifetimes.check(self.root)), 1)

    def test_range_over_what_is_held_passes(self):
        self.write("service/a.cc",
                   "for (const auto& v : view->lines.at(name)->versions) {}\n"
                   "for (const auto& name : Names()) {}\n"
                   "for (int i = 0; i < Size()->x; ++i) {}\n")
        self.assertEqual(lifetimes.check(self.root), [])


class Registries(Tree):
    def plant(self, policies, files):
        for list_name, _, _ in registries.POINTS:
            self.write(list_name, "")
        self.write("engine/policies/policies.def", policies)
        for file in files:
            self.write(file, "")

    def test_file_without_line_is_found(self):
        self.plant("", ["engine/policies/tova_policy.cc"])
        self.assertEqual(len(registries.check(self.root)), 1)

    def test_line_without_file_is_found(self):
        self.plant("KEEPSET_POLICY(tova, New)\n", [])
        self.assertEqual(len(registries.check(self.root)), 1)

    def test_duplicate_line_is_found(self):
        self.plant("KEEPSET_POLICY(tova, A)\nKEEPSET_POLICY(tova, B)\n",
                   ["engine/policies/tova_policy.cc"])
        self.assertEqual(len(registries.check(self.root)), 1)

    def test_agreement_passes(self):
        self.plant("// KEEPSET_POLICY(name, ...)\nKEEPSET_POLICY(tova, A)\n",
                   ["engine/policies/tova_policy.cc"])
        self.assertEqual(registries.check(self.root), [])


if __name__ == "__main__":
    unittest.main()
