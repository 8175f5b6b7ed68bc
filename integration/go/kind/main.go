// kind makes the calls of kind's own code that reach into a node, whose commands run in the mount namespace of a process:
//
//	kind PID load ARCHIVE      as `kind load image-archive`
//	kind PID id NAME           the image's id, as kind compares it with the one of the host's image
//	kind PID tags ID           its names, in order
//	kind PID tag ID NAME       as `kind load docker-image` names an image that is there under another name
//	kind PID version           Kubernetes' version, from the node
//	kind - cluster FILE        reads a cluster's configuration; unknown fields are errors
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sort"

	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/kind/pkg/cluster/nodes"
	"sigs.k8s.io/kind/pkg/cluster/nodeutils"
	"sigs.k8s.io/kind/pkg/exec"
)

// node is a kind node whose container is a mount namespace.
type node struct {
	nodes.Node
	pid string
}

func (n node) Command(name string, words ...string) exec.Cmd {
	return n.CommandContext(context.Background(), name, words...)
}

func (n node) CommandContext(ctx context.Context, name string, words ...string) exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--mount", "--target", n.pid, "--", name}, words...)...)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n", err)
		if failed := exec.RunErrorForError(err); failed != nil {
			os.Stderr.Write(failed.Output)
		}
		os.Exit(1)
	}
}

func run(words []string) error {
	if len(words) < 2 {
		return fmt.Errorf("usage: kind PID COMMAND ...")
	}
	n, command, rest := node{pid: words[0]}, words[1], words[2:]
	switch {
	case command == "load" && len(rest) == 1:
		archive, err := os.Open(rest[0])
		if err != nil {
			return err
		}
		defer archive.Close()
		return nodeutils.LoadImageArchive(n, archive)
	case command == "id" && len(rest) == 1:
		return say(nodeutils.ImageID(n, rest[0]))
	case command == "tags" && len(rest) == 1:
		found, err := nodeutils.ImageTags(n, rest[0])
		if err != nil {
			return err
		}
		var tags []string
		for tag := range found {
			tags = append(tags, tag)
		}
		sort.Strings(tags)
		for _, tag := range tags {
			fmt.Println(tag)
		}
		return nil
	case command == "tag" && len(rest) == 2:
		return nodeutils.ReTagImage(n, rest[0], rest[1])
	case command == "version" && len(rest) == 0:
		return say(nodeutils.KubeVersion(n))
	case command == "cluster" && len(rest) == 1:
		return readCluster(rest[0])
	}
	return fmt.Errorf("unknown command %q of %d words", command, len(rest))
}

func say(text string, err error) error {
	if err == nil {
		fmt.Println(text)
	}
	return err
}

// readCluster reads the file as kind does, and says how many nodes and patches it has.
func readCluster(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	var cluster v1alpha4.Cluster
	decoder := yaml.NewDecoder(file)
	decoder.KnownFields(true)
	if err := decoder.Decode(&cluster); err != nil && err != io.EOF {
		return err
	}
	for _, patch := range cluster.KubeadmConfigPatches {
		var read map[string]any
		if err := yaml.Unmarshal([]byte(patch), &read); err != nil {
			return fmt.Errorf("patch %q: %w", patch, err)
		}
		fmt.Println(read["kind"])
	}
	return nil
}
