// A plugin of NRI for tests, with the library of an interface before 0.12: most events had no method of their own there. Its arguments are the
// daemon's socket and the file to which it writes the name of each event and what it is about.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct{}

func note(event, id string) error {
	file, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = fmt.Fprintln(file, event, id)
	return err
}

func main() {
	one, err := stub.New(&plugin{}, stub.WithSocketPath(os.Args[1]), stub.WithPluginIdx("30"), stub.WithPluginName("earlier"))
	if err != nil {
		log.Fatalf("make the plugin: %v", err)
	}
	if err := one.Run(context.Background()); err != nil {
		log.Fatalf("run the plugin: %v", err)
	}
}

func (*plugin) Synchronize(context.Context, []*api.PodSandbox, []*api.Container) ([]*api.ContainerUpdate, error) {
	return nil, note("Synchronize", "-")
}

func (*plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return note("RunPodSandbox", pod.Id)
}

func (*plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return note("StopPodSandbox", pod.Id)
}

func (*plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return note("RemovePodSandbox", pod.Id)
}

func (*plugin) CreateContainer(_ context.Context, _ *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return nil, nil, note("CreateContainer", container.Id)
}

func (*plugin) StartContainer(_ context.Context, _ *api.PodSandbox, container *api.Container) error {
	return note("StartContainer", container.Id)
}

func (*plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, container *api.Container) error {
	return note("PostStartContainer", container.Id)
}

func (*plugin) StopContainer(_ context.Context, _ *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, note("StopContainer", container.Id)
}

func (*plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, container *api.Container) error {
	return note("RemoveContainer", container.Id)
}
